"""Statistics of `hidden @ kernel`, and their gradients, on TPUs."""
