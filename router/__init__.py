"""The router: client requests in, one lane per replica out."""
