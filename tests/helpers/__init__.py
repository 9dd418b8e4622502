"""What several test files share: small collections and students, runs that are killed, a Hub."""
