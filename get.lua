wrk.headers["Authorization"]="Bearer dbt_admin_token_for_bench_000000"
