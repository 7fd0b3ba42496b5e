"""The tabs of the page: layout and events; what they do is in the other modules."""
