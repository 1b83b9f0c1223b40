"""Training as people run it: several processes, stopped and resumed, packed data, compiled steps, TensorBoard."""
