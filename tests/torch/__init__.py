"""What surrounds a module in PyTorch: compile, export, transforms, scripting, state_dict, the ecosystem."""
