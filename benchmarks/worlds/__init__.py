"""What is quantized: two trained transformers, matrices with a stated property, random layers."""
