"""Values that cross package and process boundaries: errors, parameters, requests, plans, messages. No I/O, no torch."""
