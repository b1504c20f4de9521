"""Loading data sets and dividing them among clients. No server-side room imports this one."""
