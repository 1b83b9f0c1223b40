"""What a visit to a GPU is made of, and the report on its kernels, which needs none."""
