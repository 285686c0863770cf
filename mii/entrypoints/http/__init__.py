"""What every HTTP server of mii has: errors, request bodies, streams, the way to the load balancer, and metrics."""
