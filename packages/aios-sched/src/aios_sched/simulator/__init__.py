"""What would happen if? Requests that nobody sent, on engines that nobody has: the real scheduler in simulated time.

    trace.py               a request without text; the socket for traces
    lengths.py             how long prompts and answers are
    arrivals.py            Poisson arrivals and bursts
    chat.py                conversations with shared prefixes
    csv_trace.py           a file of one's own
    trace_options.py       from the words of the command line to a trace
    cost.py                the socket for cost models, and the plainest one
    fitting.py             a cost model from measured steps
    roofline_cost.py       a cost model from a device's datasheet
    leaping_scheduler.py   the scheduler, able to take many steps at once
    system.py              what is simulated
    replica.py             one engine
    fleet.py               the event loop: replicas behind a router
    meters.py, histogram.py, results.py   what is counted
    report.py, plots.py, timeline.py, timeline_plot.py   how it is shown
    sweep.py               the same for several values of an option

Plain Python, no torch: it runs wherever Python does.
"""
