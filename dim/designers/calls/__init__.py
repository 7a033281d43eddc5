"""How a model over HTTP is asked: one request, limits, money, and a server that is down."""
