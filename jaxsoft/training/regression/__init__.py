"""What `SoftmaxRegression` is made of: problems, solvers, data and files."""
