"""Routers: what they are, what they compute, and how a layer mixes several of them."""
