"""Tables, charts and pages; reads results only, needs no model."""
