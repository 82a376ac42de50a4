"""How fast jaxsoft is, how much memory it takes, and against whom."""
