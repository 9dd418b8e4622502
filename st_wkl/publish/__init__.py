"""Cards, the Hub and the leaderboard: what leaves this machine, and what is said about it."""
