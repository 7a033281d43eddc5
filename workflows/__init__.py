"""The whole loop, from raw pairs to a report page."""
