"""The agent as a service: its episodes as events while they run, a queue of requests, an HTTP interface."""
