"""The operator: turns SmtpRelay and SmtpUser resources into running relays, on a cluster or on this machine."""
