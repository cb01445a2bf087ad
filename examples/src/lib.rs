//! What the examples share: nothing but the licence. Each example is a file of its own in `examples/`.
