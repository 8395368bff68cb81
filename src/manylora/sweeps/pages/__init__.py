"""The report of a sweep: its charts and its page."""
