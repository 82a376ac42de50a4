"""Statistics and draws of `hidden @ kernel` on Hopper's and Blackwell's GPUs."""
