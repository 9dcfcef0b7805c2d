package doctor

import (
	"strings"
	"testing"

	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/lease/etcdtest"
)

func TestLeaseFindings(t *testing.T) {
	if f := Lease(&config.Config{}); len(f) != 0 {
		t.Errorf("without a lease: %v", f)
	}
	e := etcdtest.Start(t)
	c := &config.Config{Lease: &config.Lease{Endpoints: []string{e.Endpoint}, Prefix: "/test", TTL: config.DefaultLeaseTTL}}
	if f := Lease(c); len(f) != 1 || f[0].Level != Good || !strings.Contains(f[0].Subject, e.Endpoint) {
		t.Errorf("it is there: %v", f)
	}
	e.Stop()
	if f := Lease(c); len(f) != 1 || f[0].Level != Note || !strings.Contains(f[0].Advice, "no volume with 'promote: auto' comes up") {
		t.Errorf("it is not: %v", f)
	}
	c.Lease.Endpoints, c.Lease.CA = []string{"https://127.0.0.1:1"}, "/does/not/exist"
	if f := Lease(c); len(f) != 1 || f[0].Level != Refuse {
		t.Errorf("no file of authorities: %v", f)
	}
}
