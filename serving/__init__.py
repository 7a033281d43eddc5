"""DIM over HTTP on Ray Serve: an ingress, designers and painters, each its own deployment."""
