"""The configuration tree: frozen values with their units, limits and the reason for each default.

Pure data. `router.config` reads it from TOML, environment and flags; `router.app` hands each part to its stage.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
LANE_PORTS = 64
"""Tried from `engines.lane_port` on: as many replicas as can share a network address."""
Seconds = Annotated[float, msgspec.Meta(gt=0)]
NonNegativeSeconds = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Bytes = Annotated[int, msgspec.Meta(ge=1)]
BodyBytes = Annotated[int, msgspec.Meta(ge=1, le=128 << 20)]
"""Well below what a frame on a lane may hold."""
Name = Annotated[str, msgspec.Meta(min_length=1)]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every part of the tree."""


class HttpOptions(Options, frozen=True):
    """The OpenAI-compatible HTTP ingress."""

    enabled: bool = True
    host: str = "127.0.0.1"  # Loopback, so that nothing is exposed before somebody says so.
    port: Port = 8000  # vLLM's own default: clients need no change. 0 takes any free port.
    max_body_bytes: BodyBytes = 32 << 20  # A 1M-token prompt with a few images.
    max_header_bytes: Bytes = 64 << 10  # Twice what large cookies and traces need.
    header_timeout_s: Seconds = 10.0  # From a request's first byte to the end of its headers.
    body_timeout_s: Seconds = 30.0  # Longest pause while a body arrives, or while finished answers are not read.
    idle_timeout_s: Seconds = 620.0  # Above the 600 s of Google's load balancers, which must close first.
    stream_buffer_bytes: Bytes = 4 << 20  # What a slow client may leave unread before its stream is aborted.
    max_connections: Count = 10_000  # Below common file-descriptor limits, so that accepting never fails.
    cors_origins: tuple[str, ...] = ("*",)  # As vLLM's own server; empty turns CORS off.
    default_model: str = ""  # Model of requests whose body names none; empty refuses them.
    trust_request_id: bool = True  # Clients' x-request-id is kept; false makes up a new one.
    tls_cert_file: str = ""  # PEM chain; empty serves plaintext. All three are read again when they change.
    tls_key_file: str = ""
    tls_client_ca_file: str = ""  # Set: clients must show a certificate that this CA signed.


class GrpcOptions(Options, frozen=True):
    """The gRPC ingress."""

    enabled: bool = True
    edge: Literal["h2", "aio"] = "h2"  # Our own on HTTP/2, at a fraction of the cost per message of `aio`, grpc's.
    host: str = "127.0.0.1"
    port: Port = 9000
    max_message_bytes: BodyBytes = 32 << 20  # As the HTTP body.
    max_concurrent_streams: Count = 4096  # Per connection; grpc's own default of 100 would queue silently.
    stream_buffer_bytes: Bytes = 4 << 20  # As over HTTP.
    request_timeout_s: Seconds = 30.0  # From a call's start to its whole request message.
    read_timeout_s: Seconds = 30.0  # Longest pause of a client that has the rest of an ended stream to read.
    keepalive_time_s: Seconds = 60.0  # Below the idle limits of common load balancers.
    keepalive_timeout_s: Seconds = 20.0
    idle_timeout_s: Seconds = 1800.0  # A connection without calls; its client opens another when it needs one.
    max_connections: Count = 10_000  # As over HTTP.
    tls_cert_file: str = ""  # PEM chain; empty serves plaintext. All three are read again when they change.
    tls_key_file: str = ""
    tls_client_ca_file: str = ""  # Set: clients must show a certificate that this CA signed.
    reflection: bool = True


class AuthOptions(Options, frozen=True):
    """API keys that clients of HTTP and gRPC must show."""

    keys_file: str = ""  # TOML of `kvlane key new`, hashes only; read again when it changes. Empty lets everybody in.


class LaneOptions(Options, frozen=True):
    """Lanes to replicas."""

    carrier: Literal["socket", "actor"] = "socket"  # `actor` where only Ray's own ports are open.
    connect_timeout_s: Seconds = 5.0
    reconnect_min_s: Seconds = 0.1
    reconnect_max_s: Seconds = 5.0
    ping_interval_s: Seconds = 2.0  # A host that vanished is noticed after interval + timeout.
    ping_timeout_s: Seconds = 8.0  # Longer than any pause of a healthy replica's event loop.
    tls_ca_file: str = ""  # Set: lanes are TLS, and replicas must show a certificate that this private CA signed.
    tls_cert_file: str = ""  # This router's own PEM chain, for replicas that want one (`engines.lane_tls_ca_file`).
    tls_key_file: str = ""
    tls_server_name: str = ""  # A name that replicas' certificates must be for; empty: the private CA is enough.


class MembershipOptions(Options, frozen=True):
    """How the router learns of replicas."""

    kind: Literal["ray", "static"] = "ray"
    ray_address: str = "auto"  # The Ray cluster to join; for `kvlane up`, "local" starts one whatever runs.
    ray_namespace: Name = "kvlane"
    relist_interval_s: Seconds = 5.0  # A missed change heals within this time.
    join: bool = False  # Joins the cluster as a node without CPUs first: for a container beside it.
    node_ip: str = ""  # Address of that node; empty takes the one from which packets to the head go.
    node_tmp_dir: str = ""  # Where that node keeps sockets and logs; empty leaves it to Ray, which takes /tmp/ray.
    replicas: tuple[StaticReplica, ...] = ()  # `static` only.


class StaticReplica(Options, frozen=True, kw_only=True):
    """A replica at a fixed address."""

    name: Name
    host: str = "127.0.0.1"
    port: Port
    secret_file: str = ""  # File that holds the replica's lane secret.


class PolicyOptions(Options, frozen=True):
    """Which policy routes, and its own options (see `kvlane policies`)."""

    name: Name = "cost"  # Least expected cost; learns what it needs, needs no tuning.
    options: dict[str, Any] = {}
    stall_ms: Annotated[float, msgspec.Meta(gt=0)] = 5.0  # All streams wait meanwhile; later answers are not taken.
    explain: bool = True  # Clients may ask for every candidate (`x-kvlane-explain`); false ignores that.
    shadow: str = ""  # Another policy that decides too, without effect; metrics compare the two.
    shadow_options: dict[str, Any] = {}


class PrefixOptions(Options, frozen=True):
    """What the router knows of the replicas' KV caches."""

    enabled: bool = True  # False routes by load alone: prompts are not hashed and cache reports are not used.
    block_bytes: Annotated[int, msgspec.Meta(ge=16, le=4096)] = 256  # About 64 tokens of text: four GPU KV blocks.
    max_prompt_bytes: Bytes = 1 << 20  # What is hashed of a longer prompt; bounds the time on the event loop.
    max_blocks: Count = 2_000_000  # Of all replicas together; 0.1 GB, 0.25 in Python. Others are refused.
    hold_timeout_s: Seconds = 600.0  # Until a request that is still in flight counts no longer as soon cached.


class AdminOptions(Options, frozen=True):
    """A port for operators: health, metrics, and why requests went where they went (``/debug/routes``)."""

    enabled: bool = False  # It tells of every request, and each request then takes a little longer to route.
    host: str = "127.0.0.1"  # There is no authentication: keep it where only operators get.
    port: Port = 9100  # Worker K of several listens on this plus K, so that each can be asked.
    routes: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 512  # Requests remembered; about 0.3 KB per replica each.


class LimitOptions(Options, frozen=True):
    """Admission."""

    max_streams: Count = 20_000  # Per router process; beyond it requests get 429.
    no_replica_wait_s: NonNegativeSeconds = 10.0  # Bridges a replica's replacement.
    max_tries: Count = 3  # Replicas tried per request before its first byte.


class ShutdownOptions(Options, frozen=True):
    """How the router ends at SIGTERM. At SIGINT there is no notice, and a second signal ends it at once."""

    notice_s: NonNegativeSeconds = 5.0  # Unready, and still serving: balancers notice late, Google's after 10 to 20 s.
    grace_s: NonNegativeSeconds = 30.0  # Then until streams are cut: above the longest answers, below a Pod's patience.


class HoldOptions(Options, frozen=True):
    """Requests that wait, in order, for a model's first replica. Bounds are per router process: each worker has its
    own."""

    enabled: Literal["auto", "always", "never"] = "auto"  # Auto: models that may scale to zero; always: every model.
    max_requests: Count = 10_000  # Of all models; half of limits.max_streams, so that what need not wait gets through.
    max_bytes: Bytes = 256 << 20  # Bodies of all of them; a few thousand long prompts. Beyond either bound: 503.
    timeout_s: Seconds = 600.0  # A new node and a large model's start. Others wait for limits.no_replica_wait_s.
    comment_interval_s: NonNegativeSeconds = 15.0  # Keeps balancers from cutting streams; 0: silence.


class HoursOptions(Options, frozen=True, kw_only=True):
    """Hours of the week with more warm replicas than `min_replicas`, in a place's own time."""

    days: Name = "mon-sun"  # The days on which they begin, such as "mon-fri" or "sat, sun".
    start: Name = msgspec.field(name="from")  # Before the load comes, by the time that a replica takes to start.
    end: Name = msgspec.field(name="to")  # "24:00" is midnight; a time before `from` is on the next day.
    timezone: Name = "UTC"  # Such as "Europe/Berlin"; its clock changes are followed.
    min_replicas: Count


class AutoscalingOptions(Options, frozen=True, kw_only=True):
    """How many replicas a model has, by its load. Without this table it is always `replicas`."""

    min_replicas: Annotated[int, msgspec.Meta(ge=0)] = 1  # 0 costs nothing when idle, and the next request a start.
    max_replicas: Count  # No default: it bounds the cost.
    target_streams: Annotated[float, msgspec.Meta(ge=0)] = 0.0  # Per replica, waiting too; 0: half of its max_num_seqs.
    wake_replicas: Count = 1  # Started at once when a request finds none; more only follow when the first is ready.
    upscale_delay_s: NonNegativeSeconds = 10.0  # A burst that ends sooner starts nothing.
    downscale_delay_s: NonNegativeSeconds = 300.0  # Starting a replica again may take minutes.
    downscale_to_zero_delay_s: NonNegativeSeconds = 900.0  # The next request would wait for a start.
    schedule: tuple[HoursOptions, ...] = ()  # Where several hours overlap, the most replicas count.


class EngineOptions(Options, frozen=True):
    """One model's engine replicas, run by Ray Serve."""

    name: Name = "tiny"  # The Serve application, and the model's name unless `served_model_name` is set.
    kind: Literal["vllm", "sim"] = "vllm"
    model: str = ""  # Hugging Face id or path; empty makes a tiny random-weight Llama on the spot.
    served_model_name: str = ""
    replicas: Count = 1
    autoscaling: AutoscalingOptions | None = None
    args: dict[str, Any] = {}  # Any vLLM engine argument, or the simulated engine's options.
    num_cpus: Annotated[float, msgspec.Meta(ge=0)] = 1.0  # Ray CPUs of one replica.
    num_gpus: Annotated[float, msgspec.Meta(ge=0)] = 0.0  # Ray GPUs of one tensor-parallel worker.
    tensor_parallel_size: Count = 1
    required: bool = True  # Readiness waits for a replica of this model.
    env: dict[str, str] = {}  # Environment variables of the replica's process.
    lane_host: str = ""  # Address that replicas listen on; empty takes the Ray node's.
    lane_port: Port = 0  # The first of 64 ports that are tried, so that firewalls can name them; 0 takes any free one.
    lane_tls_cert_file: str = ""  # PEM chain on the engine's host; set: lanes are TLS. `lane.tls_ca_file` goes with it.
    lane_tls_key_file: str = ""
    lane_tls_ca_file: str = ""  # Set: routers must show a certificate that this private CA signed.
    drain_timeout_s: Seconds = 3600.0  # How long a replica that goes away may finish its streams; longer than any.
    sleep_after_s: NonNegativeSeconds = 0.0  # Without a stream for so long a replica sleeps; 0 never.
    sleep_level: Literal[1, 2] = 1  # 1 wakes soonest and takes host memory for the weights; 2 loads them again.
    surge: Literal["auto", "always", "never"] = "auto"  # Redeploy with one replica more; auto: where no GPU is needed.
    health_check_period_s: Seconds = 2.0  # A dead engine is replaced after about three of these.
    fast_rendering: bool = True  # Plain text streams cost less; the bytes are those of vLLM's own server either way.


class RayOptions(Options, frozen=True):
    """Ray itself; only `kvlane up` starts it."""

    num_cpus: Annotated[int, msgspec.Meta(ge=0)] = 0  # CPUs to declare; 0: the machine's, more where replicas need it.


class LogOptions(Options, frozen=True):
    """The log, one line per record on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"  # Client mistakes and replicas' lives show.


class Config(Options, frozen=True):
    """Fields that belong to no table; they stand first in the file."""

    http: HttpOptions = HttpOptions()
    grpc: GrpcOptions = GrpcOptions()
    auth: AuthOptions = AuthOptions()
    lane: LaneOptions = LaneOptions()
    membership: MembershipOptions = MembershipOptions()
    policy: PolicyOptions = PolicyOptions()
    prefix: PrefixOptions = PrefixOptions()
    limits: LimitOptions = LimitOptions()
    hold: HoldOptions = HoldOptions()
    admin: AdminOptions = AdminOptions()
    engines: tuple[EngineOptions, ...] = ()
    ray: RayOptions = RayOptions()
    log: LogOptions = LogOptions()
    shutdown: ShutdownOptions = ShutdownOptions()
    reload_on_change: bool = True  # Kubernetes changes mounted files and signals nobody; only `kvlane serve --config`.
    workers: Count = 1  # Router processes on the same ports.
