"""TensorRT's Python bindings without TensorRT, to test the Python half of plugins. Used by tests only.

The bindings are a wheel of their own; ``build.py`` makes the libraries that they ask for, of functions that do nothing.
``network.py`` has a network that takes a plugin the way TensorRT does, and tells what TensorRT would launch. Nothing
else of the bindings may be used: a real network or builder of theirs would call into the void. Modules that import them
run in a process of their own (``tests/_kernels/plugins/test_tensorrt.py``).
"""
