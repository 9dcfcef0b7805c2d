package agent

import (
	"strings"
	"testing"

	"blockferry/protocol"
)

// history is generation, epoch, generation, epoch...
func history(points ...uint64) (l protocol.Lineage) {
	for i := 0; i < len(points); i += 2 {
		l = append(l, protocol.Position{Generation: protocol.Generation{byte(points[i])}, Epoch: points[i+1]})
	}
	return l
}

// A disk that another node's copy left behind is not written, nor is one beside a
// primary that serves another line. One that is down keeps nobody from coming up.
func TestSecondPrimaryStaysDown(t *testing.T) {
	serving, down := heard{primary: true, serving: true}, heard{primary: true}
	for name, c := range map[string]struct {
		disk, other protocol.Lineage
		h           heard
		refused     bool
	}{
		"it took over while this one began anew":       {history(1, 10, 2, 11), history(1, 10, 3, 13), serving, true},
		"the same, and it is down":                     {history(1, 10, 2, 11), history(1, 10, 3, 13), down, false},
		"the same, and it is secondary":                {history(1, 10, 2, 11), history(1, 10, 3, 13), heard{}, false},
		"it took over from what this one went on from": {history(1, 11), history(1, 10, 3, 13), down, true},
		"it went on": {history(1, 10), history(1, 10, 3, 13), heard{}, true},
		"this one took over from it, which went on":        {history(1, 10, 3, 13), history(1, 11), down, false},
		"it serves, and this one went on from what it has": {history(1, 10, 3, 13), history(1, 10), serving, false},
		"it says nothing of its history":                   {history(1, 10), nil, serving, false},
	} {
		h := c.h
		h.lineage = c.other
		if why := h.supersedes(c.disk, "node-b"); (why != "") != c.refused {
			t.Errorf("%s: %q", name, why)
		}
	}
}

// Of another secondary it is said when that one holds more.
func TestWhoIsAheadIsNamed(t *testing.T) {
	for name, c := range map[string]struct {
		mine, other protocol.Lineage
		ahead       bool
	}{
		"it has later cuts":                  {history(1, 10), history(1, 12), true},
		"it has those of a later generation": {history(1, 10), history(1, 10, 2, 12), true},
		"it is level":                        {history(1, 10), history(1, 10), false},
		"it is behind":                       {history(1, 10), history(1, 9), false},
		"it went its own way":                {history(1, 10), history(1, 9, 2, 12), false},
		"it has nothing":                     {history(1, 10), nil, false},
		"neither has anything":               {nil, history(1, 10), false},
	} {
		h := heard{lineage: c.other}
		if got := strings.Contains(h.inWords(c.mine, "node-b"), "ahead of the copy here"); got != c.ahead {
			t.Errorf("%s: %s", name, h.inWords(c.mine, "node-b"))
		}
	}
}
