"""The gradient flow: recording, summary, pictures, files, Jacobians."""
