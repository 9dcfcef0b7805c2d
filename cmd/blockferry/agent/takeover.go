package agent

import (
	"fmt"
	"time"

	"blockferry/cmd/blockferry/status"
	"blockferry/protocol"
)

// takeOverStatus is what is known, without asking anybody, of the copy here if it took over.
// A nil s has no copy that can.
func (s *switching) takeOverStatus() *status.TakeOver {
	if s == nil {
		return nil
	}
	st, err := s.promotable()
	st.PendingEpochs = 0 // they are applied first
	whole := protocol.TakeOverOptions{Force: true, Fresh: protocol.Generation{1}}
	if err == nil {
		_, err = protocol.PlanTakeOver(st, whole)
	}
	if err == nil && st.Strayed != "" {
		err = fmt.Errorf("%w: %s", protocol.ErrStrayed, st.Strayed)
	}
	if err != nil {
		return &status.TakeOver{Reason: err.Error()}
	}
	said, silent := map[string]heard{}, map[string]string{}
	s.mu.Lock()
	for _, node := range s.config.Peers {
		if h, ok := s.heard[node]; ok && !h.before && time.Since(h.at) < heardFor {
			said[node] = h
		} else {
			silent[node] = "it was not heard"
		}
	}
	s.mu.Unlock()
	k, _ := s.weigh(st, said, silent)
	whole.Heard = k.beside(st.Lineage)
	plan, _ := protocol.PlanTakeOver(st, whole)
	t := &status.TakeOver{Possible: true}
	switch {
	case plan.Loss.None:
		t.MissingCuts = new(uint64)
	case plan.Loss.Known:
		cuts := plan.Loss.Cuts
		if !k.written { // the last one of a copy is a cut, of a primary it is open
			cuts++
		}
		t.MissingCuts = &cuts
	}
	return t
}
