"""The installed model as a service for other programs of this device: HTTP and gRPC on a local socket.

`holder` keeps the model that answers and swaps it, `service` admits requests and keeps deadlines, `http` and
`rpc` are the two ways to ask, `running` puts them together.
"""
