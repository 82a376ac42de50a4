"""What every room shares: checks, temperature, noise, tokens' weights, numerics."""
