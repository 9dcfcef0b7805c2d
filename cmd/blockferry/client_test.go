package main

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"blockferry/cmd/blockferry/exit"
	"blockferry/proto"
)

// A sequence of answers is a progressStream.
type answers []*proto.Progress

func (a *answers) Recv() (*proto.Progress, error) {
	if len(*a) == 0 {
		return nil, io.EOF
	}
	m := (*a)[0]
	*a = (*a)[1:]
	return m, nil
}

// What is told on the way is shown before the outcome, whatever that is, and is none itself.
func TestFollow(t *testing.T) {
	told := &proto.Progress{Message: "what differs"}
	for _, asJSON := range []bool{false, true} {
		for _, failed := range []bool{false, true} {
			var out, errs bytes.Buffer
			g := &globalOptions{streams: streams{out: &out, err: &errs}, json: asJSON}
			err := g.follow(t.Context(), "data", &answers{{Phase: "verify", DoneBytes: 1, TotalBytes: 2}, told, {Finished: true, Failed: failed, Message: "the end"}})
			if (exit.Of(err) == exit.Differs) != failed || failed != (err != nil) {
				t.Errorf("failed %v: %v", failed, err)
			}
			before, after, ok := strings.Cut(out.String(), "what differs")
			if !ok || strings.Contains(before, "the end") || strings.Contains(after, "the end") == failed || strings.Contains(errs.String(), "what differs") {
				t.Errorf("failed %v, JSON %v: %s", failed, asJSON, out.String())
			}
		}
	}
	g := &globalOptions{streams: streams{out: io.Discard, err: io.Discard}}
	if err := g.follow(t.Context(), "data", &answers{told}); exit.Of(err) != exit.Failed {
		t.Errorf("an agent that ended without an outcome: %v", err)
	}
}
