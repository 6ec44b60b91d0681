"""Pure loss functions: arrays in, arrays out. They never meet a model."""
