"""Every loss and advantage of the method, as pure functions on tensors."""
