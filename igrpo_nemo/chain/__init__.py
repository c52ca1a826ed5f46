"""Train, convert, evaluate, compare: the stages behind `pipelines/`, and what lets them restart."""
