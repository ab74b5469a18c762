"""What ``python -m jaxattn.selfcheck`` consists of."""
