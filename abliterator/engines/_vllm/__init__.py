"""vLLM as an engine: found, started and ended, and given candidates as adapters.

The server is a process of another environment, as a rule: nothing here imports vLLM.

    with vllm_server(find_vllm(python), Served(folder), settings, log=log) as server:
        load_adapter(server.address, "candidate", adapter_folder)
"""
