"""The router: client requests in, one lane per replica out.

Ray reads its settings once, when it is loaded, so what this process needs of them is set here, before any module of
this package imports it: without the cluster's head Ray ends the process after 60 s, and a router must outlive that.
"""

import os

HEAD_OUTAGE_S = 86_400
"""How long Ray lets this process, and the node that it starts, live without the cluster's head, unless the environment
says otherwise."""

HEAD_LIMIT = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Ray's own variable for it."""

os.environ.setdefault(HEAD_LIMIT, str(HEAD_OUTAGE_S))
