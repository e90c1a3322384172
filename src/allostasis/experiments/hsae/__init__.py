"""Do concepts of a language model form a hierarchy, and does an autoencoder gain from knowing it?

Question. In the unembedding, under the causal inner product, a concept is said to be a vector, and
what tells a child from its siblings to be orthogonal to the parent. A hierarchical autoencoder that
starts from such vectors is said to be purer, to leak less and to steer better.

Design. `hsae_teacher` estimates vectors of WordNet's nouns and asks for what noise cannot give:
tokens that were held out, parents that share no token with the child, spread instead of signed
means, interventions of equal dose. `hsae_train` trains autoencoders from those vectors and from
vectors of the same shape without their content. `hsae_steer` adds what was learned to the stream.

What would refute it. Held-out tokens that do not lie where their concept's vector points; parents
and differences from disjoint tokens whose root mean square cosine is beyond that of 80 degrees;
autoencoders that gain as much from rotated or shuffled vectors.
"""
