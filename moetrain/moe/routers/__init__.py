"""The routers, one to a file. Their settings stand in `moetrain.config.routers` and name them."""
