//! The package of the examples. Each example is a file of its own in `examples/`.
