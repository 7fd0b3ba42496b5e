"""Everything that changes a model: the trainable tensors, the adapted projections, attaching and detaching."""
