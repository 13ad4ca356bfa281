"""What is quantized here: two trained transformers, matrices with a stated property, random layers."""
