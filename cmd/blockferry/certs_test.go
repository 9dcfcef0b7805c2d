package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"blockferry/cmd/blockferry/exit"
)

// From nothing to two nodes, and a renewal, as the manual tells it.
func TestCertsCommand(t *testing.T) {
	ca, out := filepath.Join(t.TempDir(), "ca"), filepath.Join(t.TempDir(), "b")
	config := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(config, []byte("node: {name: node-b, certs: "+out+"}\nvolumes: {v: {device: /d, replicas: {r: {device: /r}}}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		code exit.Code
		want string
	}{
		{[]string{"isue"}, exit.Usage, "did you mean 'issue'"},
		{[]string{"issue", "node-a", "--ca", ca}, exit.Prerequisite, "blockferry certs init"},
		{[]string{"init", "--ca", ca, "--days", "0"}, exit.Usage, "--days: 0 days are not between"},
		{[]string{"init", "--ca", ca}, exit.OK, "expires on"},
		{[]string{"init", "--ca", ca}, exit.Refused, "ca.crt is there already; nothing was overwritten"},
		{[]string{"issue", "Node-A", "--ca", ca}, exit.Usage, "only a-z"},
		{[]string{"issue", "node-a", "--ca", ca}, exit.OK, filepath.Join(ca, "nodes", "node-a") + ": node 'node-a', issued by 'blockferry'"},
		{[]string{"issue", "node-b", "--ca", ca, "--out", out}, exit.OK, "in 365 days"},
		{[]string{"issue", "node-b", "--ca", ca, "--out", out}, exit.Refused, "blockferry certs renew " + out},
		{[]string{"renew", out, "--ca", ca, "--days", "30"}, exit.OK, "in 30 days; it replaces"},
		{[]string{"renew", t.TempDir(), "--ca", ca}, exit.Prerequisite, "no such file"},
		{[]string{"show", out}, exit.OK, "node 'node-b'"},
		{[]string{"show", "--config", config}, exit.OK, "expires on"},
		{[]string{"show", "--json", "--config", config}, exit.OK, `"name":"node-b"`},
		{[]string{"show", "--config", sample(t, "valid/minimal.yaml")}, exit.Usage, "names no 'certs'"},
	} {
		text, errs, code := blockferry(t, append([]string{"certs"}, c.args...)...)
		if code != c.code || !strings.Contains(text+errs, c.want) {
			t.Errorf("%v: code %d, %q, %q; want %d, %q", c.args, code, text, errs, c.code, c.want)
		}
	}
}
