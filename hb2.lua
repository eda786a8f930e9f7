wrk.method="POST"; wrk.body='{"status":"online"}'; wrk.headers["Content-Type"]="application/json"; wrk.headers["Authorization"]="Bearer dbt_admin_token_for_bench_000000"
