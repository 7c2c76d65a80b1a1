"""What `octavo bench` measures: prompts, runs of the engine, and the field's numbers made of their times."""
