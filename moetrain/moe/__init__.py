"""The mixture-of-experts blocks: routing, dispatch, experts, hyper-experts, and the layer that joins them."""
