"""Does it look like spam: rules, their behaviour history, and engines."""
