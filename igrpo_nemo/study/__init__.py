"""Arms x tasks x seeds at one budget: does refining help, when, and why."""
