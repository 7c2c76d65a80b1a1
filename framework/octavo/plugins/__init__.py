"""The plugin host: discovery, specs, selection."""
