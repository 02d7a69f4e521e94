"""Where clients come in: HTTP and gRPC. Each ingress turns a request into `Request`, and errors into its protocol."""
