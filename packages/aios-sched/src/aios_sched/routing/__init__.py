"""Which of several engines gets this request? `base.py` is the socket, `router.py` keeps the books.

    base.py              RoutedRequest in, Choice out: the socket for policies
    loads.py             ReplicaLoads: outstanding tokens of each replica, the least loaded one at any time
    round_robin.py       one after the other
    least_loaded.py      who has the least to do
    session.py           one session, one replica
    prefix_affinity.py   who has computed the longest prefix of this prompt, unless it is far busier than others
    router.py            Router: policy and loads together; a Ticket for each open request

Plain Python, and cheap per decision: a server with two replicas and a simulator with thousands use the same code.
"""
