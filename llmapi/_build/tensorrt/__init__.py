"""The TensorRT backend's build: the graph becomes a network, and the network a plan.

``package`` finds TensorRT, ``lower`` makes the network, ``shapes`` what sizes it takes,
``plan`` builds it.
"""
